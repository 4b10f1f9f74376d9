"""Texts become token ids: limits of length, tokenizers, and pairs of texts. Knows no HTTP."""
