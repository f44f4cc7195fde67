"""python -m qmix"""

from qmix.cli import main

if __name__ == "__main__":
    main()
