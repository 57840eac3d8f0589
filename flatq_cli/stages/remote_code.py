"""The few lines of code in an export, for programs that know transformers and not flatq.

`from_pretrained(dir, trust_remote_code=True)` asks `auto_map` of config.json for classes and imports the module they
are in. That module imports flatq_cli, which registers the format with transformers: all the rest goes as it does after
`import flatq_cli`. It has to happen with the configuration, which comes first: lm_eval, for one, asks transformers for
the quantization method by name before it loads the model. Without `trust_remote_code` transformers knows the
architecture itself, so it neither runs this module nor asks whether it may.

The configuration that comes back is of transformers' own class, which its tables know. The model is of a subclass under
the same name, whose `save_pretrained` takes the module along; marking the stock class itself so would make every model
of its kind do that.
"""

from __future__ import annotations

MODULE = "modeling_flatq"
FILE = f"{MODULE}.py"
CONFIG_CLASS = "StockConfig"

_CODE = '''\
"""What `from_pretrained(dir, trust_remote_code=True)` imports: transformers' own {architecture}, in flatq's format.

Importing flatq_cli is all that counts: it registers the format with transformers.
"""

try:
    import flatq_cli  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"a model in flatq's format needs flatq ({{error}}): pip install flatq") from error

import transformers


class {config}(transformers.{config_class}):
    """Reads the configuration as what it is, a {config_class}."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return transformers.{config_class}.from_pretrained(*args, **kwargs)


class {architecture}(transformers.{architecture}):
    """The same under its own name."""
'''


def auto_map(architecture: str) -> dict[str, str]:
    """`auto_map` of config.json: which classes of the module transformers' auto classes stand for."""
    return {"AutoConfig": f"{MODULE}.{CONFIG_CLASS}", "AutoModelForCausalLM": f"{MODULE}.{architecture}"}


def remote_code(architecture: str, config_class: str) -> str:
    """The text of the module.

    Args:
        architecture: transformers' class of the model, such as `LlamaForCausalLM`. config_class: of its configuration.
    """
    return _CODE.format(architecture=architecture, config_class=config_class, config=CONFIG_CLASS)
