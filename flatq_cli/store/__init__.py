"""The run directory: atomic writes, safetensors, manifests, and which run a folder used last."""
