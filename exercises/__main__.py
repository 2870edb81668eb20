"""python -m exercises 3: is the third answer right?"""

import sys

from exercises import main

sys.exit(main(sys.argv[1:]))
