"""How much memory keys and values may take, and how much of it a prompt will."""

from __future__ import annotations

import json
from collections import OrderedDict

import numpy as np
import psutil
import torch

from llava.inference import LoadedModel
from llava.pruning import PruningTrace
from llava.pruning.families import adapter_for

from .request import Request

SHARE = 0.8
"""Of the memory that is free once the weights are there. The rest is for rows on their way through the layers."""
KNOWN_CONFIGS = 256


def free_bytes(model: LoadedModel) -> int:
    """A budget for keys and values: a share of what is free on the model's device now."""
    device = model.model.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(SHARE * free)


class Forecast:
    """Rows that prompts will hold, before they are decided on.

    Text rows never leave, so only the share of the visual rows that each layer holds is to be known. A config that was
    not seen yet is taken for dense; after that for the least pruned prompt that it was seen with.
    """

    def __init__(self, model: LoadedModel) -> None:
        config = adapter_for(model.model).decoder.config
        self.num_layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.row_bytes = 2 * heads * head_dim * model.model.dtype.itemsize
        self._shares: OrderedDict[str, np.ndarray] = OrderedDict()  # [layers] each

    def least_bytes(self, request: Request, limit: int) -> int:
        """What a request holds at the very least, with all visual rows gone: keys and values of its text."""
        text = request.prompt.num_rows - request.prompt.num_visual
        return request.copies * self.num_layers * (text + limit) * self.row_bytes

    def bytes(self, request: Request, limit: int) -> int:
        """What a request will hold, as far as can be told.

        Args:
            limit: tokens that each of its answers may get.
        """
        share = self._shares.get(_key(request))
        held = self.num_layers if share is None else float(share.sum())
        return self.least_bytes(request, limit) + int(
            np.ceil(request.copies * held * request.prompt.num_visual * self.row_bytes)
        )

    def correct(self, request: Request, trace: PruningTrace) -> None:
        """Learn from what was decided."""
        if not trace.num_visual:
            return
        text = trace.num_rows - trace.num_visual
        seen = (np.array(trace.rows_per_layer) - text) / trace.num_visual
        key = _key(request)
        self._shares[key] = np.maximum(self._shares.get(key, seen), seen)
        self._shares.move_to_end(key)
        if len(self._shares) > KNOWN_CONFIGS:
            self._shares.popitem(last=False)


def _key(request: Request) -> str:
    return json.dumps(request.config.to_dict(), sort_keys=True) if request.config is not None else ""
