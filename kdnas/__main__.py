"""``python -m kdnas``."""

from kdnas.cli import main

raise SystemExit(main())
