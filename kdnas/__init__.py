"""Knowledge distillation guided by neural architecture search, for BERT-family encoders."""

__version__ = "0.1.0"
