"""`python -m light_tts.cli`"""

import sys

from light_tts.cli.main import main

sys.exit(main())
