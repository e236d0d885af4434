"""Causal language models as policies: the only files that import transformers, tokenizers and peft, and only when asked.

Needs `pip install 'upslope[language]'`.
"""
