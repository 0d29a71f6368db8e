from kdnas.api import distill as distill
from kdnas.api import search as search

__version__: str
