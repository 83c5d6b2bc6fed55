"""lmms-eval finds this project here, through its entry-point group `lmms_eval.models`.

`lmms-eval eval --model visipruner --model_args pretrained=…,pruning_config=… --tasks gqa,mme,textvqa_val`
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks for: the model's name and where its class is. lmms-eval calls it, so it is there."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visipruner", simple_class_path="llava.integrations.lmms_eval.model.VisiPrunerModel")
