"""`python -m minillm.cli`, as torchrun and deepspeed start it."""

import sys

from minillm.cli.main import main

sys.exit(main())
