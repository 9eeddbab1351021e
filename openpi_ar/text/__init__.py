"""Text to tokens and back: tokenizers, templates, packing."""
