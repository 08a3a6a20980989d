"""Contract checks: what every loss implementation, head, backbone and objective must keep, as plain functions.

The project's tests range over the registries with them; a plugin calls them on parts of its own, under any test runner or none. Each
returns when all is well and raises AssertionError naming the promise that is broken. Choices: numbers are compared with a definition
written out in fp64; every search for a leak has a control that must find something; an option that a part accepts and ignores is a fault.
"""

from heads_lightning.testing.backbones import check_backbone
from heads_lightning.testing.heads import check_head
from heads_lightning.testing.leaks import check_leaks
from heads_lightning.testing.losses import check_loss
from heads_lightning.testing.objectives import byte_vocabulary, check_objective, text_stream

__all__ = ["byte_vocabulary", "check_backbone", "check_head", "check_leaks", "check_loss", "check_objective", "text_stream"]
