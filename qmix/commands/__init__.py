"""The commands of `qmix`, a file or a folder each. options.py has the flags that several share."""
