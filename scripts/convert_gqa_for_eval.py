#!/usr/bin/env python
"""Turn an answers file into the predictions file that GQA's own evaluation script reads.

``python scripts/convert_gqa_for_eval.py --src answers.jsonl --dst testdev_balanced_predictions.json``
"""

import json

from llava.eval.eval_gqa import to_predictions
from llava.eval.files import read_answers
from llava.options import Parser
from llava.utils import run_main, write_whole


def main() -> None:
    parser = Parser(description="Answers (jsonl) → GQA's testdev_balanced_predictions.json.")
    parser.add_argument("--src", required=True, metavar="FILE", help="answers of llava.eval.model_vqa_loader")
    parser.add_argument("--dst", required=True, metavar="FILE", help="predictions file to write")
    args = parser.parse_args()
    write_whole(args.dst, json.dumps(to_predictions(read_answers(args.src))))


if __name__ == "__main__":
    run_main(main)
