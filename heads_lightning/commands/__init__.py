"""The commands: thin layers over the library, one module each, imported when they are called.

dispatch.py picks one and guards it; hydra_application.py runs those that go through Hydra (train, prepare);
arguments.py reads `KEY=VALUE` arguments of the others into a dataclass.
"""
