"""Causal language models as policies: the only files that import transformers, tokenizers and peft.

They do so only when they are used, which needs `pip install 'upslope[language]'`.
"""
