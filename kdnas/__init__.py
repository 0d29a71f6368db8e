"""kdnas: knowledge distillation guided by neural architecture search, for BERT-family encoders."""

__version__ = "0.1.0"

from kdnas.api import distill as distill
from kdnas.api import export as export
from kdnas.api import glue as glue
from kdnas.api import latency as latency
from kdnas.api import run as run
from kdnas.api import search as search
