"""``python -m kdnas``."""

from kdnas.cli.main import main

raise SystemExit(main())
