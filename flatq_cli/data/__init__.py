"""Texts for calibration and evaluation, and the windows of tokens cut from them."""
