"""What the thread under way runs: bound to a call of a model from its beginning to its end, however it ends."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastmmoe.prefill.installation import Installation
    from fastmmoe.prefill.plan import Plan
    from fastmmoe.prefill.sequence import ForwardPass


@dataclass
class Call:
    """One call of a model: of its head, its multimodal model or its text model, and of all that is called inside.

    Attributes:
        installation: of the text model inside.
        plan: what is in force, from here to the end of the call; None: nothing.
        by_embeddings: the caller gave embeddings in place of ids.
        at: the module that the call is in: 0 the head, 1 the multimodal model, 2 the text model. What is called in it
            from further up is a call of its own.
        entered: the innermost module that the call has come to.
        back: how many tokens the asking token lies in front of a sample's last token.
        vision: the vision mask of the multimodal model that the call is in.
        special: where its tokens that are neither text nor vision stand, if the plan asks for them.
        held: the plan is kept on until the call ends.
    """

    installation: "Installation"
    plan: "Plan | None"
    by_embeddings: bool
    at: int = -1
    entered: int = -1
    back: int = 0
    vision: torch.Tensor | None = None
    special: torch.Tensor | None = None
    held: bool = False


class Running(threading.local):
    """What runs in this thread. Several threads may run one model; a forward itself never changes threads.

    Attributes:
        call: the call under way.
        forward: the text model's forward under way, if it is pruned, reduced, or on a pruned cache.
    """

    def __init__(self) -> None:
        # in every thread. Defaults of the class are what torch.compile takes for the values before torch 2.13
        self.call: Call | None = None
        self.forward: ForwardPass | None = None


RUNNING = Running()
