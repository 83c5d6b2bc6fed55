"""Writes the notebooks of `visualization/`, runs them, and keeps their figures.

``python scripts/build_notebooks.py [NAME …]``; needs the extras `viz` and `dev`. The prose and the cells are here; what
they call is in `llava/visualize`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "visualization"
LIMIT = 400 * 1024  # bytes of one notebook

PARAMETERS = """
from llava.constants import SHIPPED_MODEL_PATH

MODEL = SHIPPED_MODEL_PATH  # or a folder or hub id, such as "liuhaotian/llava-v1.5-7b"
PICTURE = SHIPPED_MODEL_PATH.parent / "images" / "easy_blue_circle.png"  # or your own path or URL
QUESTION = "What color is the shape?"
CONFIG = None  # a pruning config; None: the one recommended for the model
"""
START = """
%matplotlib inline
import warnings

import numpy as np

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar's, where Jupyter's widgets are not installed

from llava.inference import LoadedModel, open_checkpoint
from llava.visualize import *
from llava.visualize.draw import *

chat = LoadedModel(open_checkpoint(MODEL))
config = chat.checkpoint.pruning_config(CONFIG)
"""
PAPER = "*VisiPruner: Decoding Discontinuous Cross-Modal Dynamics for Efficient Multimodal LLMs* (arXiv 2510.17205)"
SMALL = (
    "The figures below come from the small model that ships with this project. It shows the tools at work; the "
    "paper's claims are about LLaVA-1.5. Change the parameter cell to look at that model on a GPU."
)

# By name: Markdown ("md") and code cells.
NOTEBOOKS: dict[str, list[tuple[str, str]]] = {
    "project_hidden_states_to_semantic_space": [
        (
            "md",
            f"""
            # Hidden states as words: the logit lens

            After every layer, the hidden state of one row goes through the final norm and `lm_head`, as if that layer
            were the last. What comes out is a distribution over words.

            **What the paper says** ({PAPER}): shallow layers recognise the task, so words of the *kind* of answer appear
            first; the image's own answer appears abruptly in a few middle layers; deep layers polish.

            **What to look for**: the layer at which the answer overtakes its rivals, and whether pruning changes it.

            {SMALL}
            """,
        ),
        ("code", PARAMETERS),
        ("code", START),
        (
            "code",
            """
            dense = observe(chat, PICTURE, QUESTION)
            dense.answer
            """,
        ),
        (
            "md",
            """
            ## The last row of the prompt

            The answer's first token is read from this row. Its last line is the model's own next-token distribution.
            (transformers' `hidden_states` hold L + 1 entries and the last one is normed already; norming it again, or
            taking entry L − 1 for the last, shows another distribution. The recorder takes every state before the norm.)
            """,
        ),
        (
            "code",
            """
            lens = logit_lens(chat.model, chat.tokenizer, dense.last)
            draw_top_tokens(lens, f"Logit lens, last row of “{QUESTION}”")
            """,
        ),
        (
            "code",
            """
            rivals = lens.ids[-1, :4]
            draw_token_probabilities(
                token_probabilities(chat.model, dense.last, rivals), lens.texts[-1, :4], "When the answer appears (dense run)"
            )
            """,
        ),
        (
            "md",
            """
            ## The same with visual tokens pruned

            If only the tokens that matter were kept, the curves end where they did before.
            """,
        ),
        (
            "code",
            """
            pruned = observe(chat, PICTURE, QUESTION, config)
            print(pruned.answer, "| selected at layer", pruned.trace.select_layer, "| kept", int(pruned.kept.sum()))
            draw_token_probabilities(
                token_probabilities(chat.model, pruned.last, rivals), lens.texts[-1, :4], "When the answer appears (pruned run)"
            )
            """,
        ),
        (
            "md",
            """
            ## A visual row

            The patch whose share in the last row's output is longest at the selecting layer. Visual rows are trained
            to be read, not to speak; words that fit the picture are a sign of what they carry.
            """,
        ),
        (
            "code",
            """
            layer = pruned.trace.select_layer or int(np.nanargmin(smallest_cosines(dense.last)))
            patch = int(np.nanargmax(dense.last.norm[layer]))
            position = int(dense.recording.visual_positions[patch])
            seen = observe(chat, PICTURE, QUESTION, rows=[position])
            draw_top_tokens(
                logit_lens(chat.model, chat.tokenizer, seen.recording.row(position)), f"Logit lens, visual row of patch {patch}"
            )
            """,
        ),
    ],
    "project_vo_to_semantic_space": [
        (
            "md",
            f"""
            # Value vectors as words: the value–output lens

            What attention moves from one row to another are value vectors, sent through the output projection. Projected
            to the vocabulary (output projection → final norm → `lm_head`) they show *what* is moved, head by head.

            **What the paper says** ({PAPER}): a handful of visual tokens carry the answer, and they are read in a few
            middle layers.

            **What to look for**: the layers in which what the last row reads from the image spells the answer.

            {SMALL}
            """,
        ),
        ("code", PARAMETERS),
        ("code", START),
        (
            "code",
            """
            dense = observe(chat, PICTURE, QUESTION)
            dense.answer
            """,
        ),
        (
            "md",
            """
            ## What the last row reads from the image

            The weighted values of all visual rows, summed over heads.
            """,
        ),
        (
            "code",
            """
            from_image = value_output_lens(chat.model, chat.tokenizer, dense.last.image_output)
            layers = [f"layer {n}" for n in range(dense.recording.num_layers)]
            draw_top_tokens(from_image, "Value–output lens, what the last row reads from the image", layers)
            """,
        ),
        (
            "md",
            """
            ## Head by head

            In the layer where one visual token matters most (the smallest cosine of the probe).
            """,
        ),
        (
            "code",
            """
            layer = int(np.nanargmin(smallest_cosines(dense.last)))
            heads = value_output_lens(chat.model, chat.tokenizer, dense.last.image_output, per_head=True)
            names = [f"head {n}" for n in range(heads.ids.shape[1])]
            draw_top_tokens(TopTokens(*(part[layer] for part in heads)), f"What each head reads from the image, layer {layer}", names)
            """,
        ),
        (
            "md",
            """
            ## What one visual row offers

            Its value vectors by themselves, whoever reads them.
            """,
        ),
        (
            "code",
            """
            patch = int(np.nanargmax(dense.last.norm[layer]))
            position = int(dense.recording.visual_positions[patch])
            seen = observe(chat, PICTURE, QUESTION, rows=[position])
            offered = value_output_lens(chat.model, chat.tokenizer, seen.recording.row(position).values)
            draw_top_tokens(offered, f"Value–output lens, visual row of patch {patch}", layers)
            """,
        ),
    ],
    "attention_visualization": [
        (
            "md",
            f"""
            # Attention to the image

            Where the prompt's last row looks, layer by layer, over the picture.

            **What the paper says** ({PAPER}): in shallow layers the image's attention is passive (sinks); then text reads
            the image abruptly, in a few middle layers; deep layers no longer need it.

            **What to look for**: layers whose map lies on the object that was asked about. A large share of attention on
            the image is not yet reading it: see `L1_norms_of_value_matrix.ipynb`.

            {SMALL}
            """,
        ),
        ("code", PARAMETERS),
        ("code", START),
        (
            "code",
            """
            dense = observe(chat, PICTURE, QUESTION)
            dense.answer
            """,
        ),
        (
            "code",
            """
            attention = attention_to_image(dense.recording, dense.last)
            layers = [f"layer {n}" for n in range(len(attention))]
            draw_on_picture(
                dense.picture.image, dense.patches, attention, layers, "Attention of the last row (mean over heads)", "attention"
            )
            """,
        ),
        (
            "md",
            """
            ## The three stages at a glance

            The same attention, added up over prefix (what stands before the image), image, and the text behind it.
            """,
        ),
        (
            "code",
            """
            draw_shares(attention_shares(dense.recording, dense.last), "Where the last row's attention goes (dense run)")
            """,
        ),
        (
            "md",
            """
            ## Single heads

            In the layer where one visual token matters most.
            """,
        ),
        (
            "code",
            """
            layer = int(np.nanargmin(smallest_cosines(dense.last)))
            heads = range(min(8, dense.last.attention.shape[1]))
            maps = np.stack([attention_to_image(dense.recording, dense.last, head)[layer] for head in heads])
            draw_on_picture(
                dense.picture.image, dense.patches, maps, [f"head {n}" for n in heads], f"Attention of single heads, layer {layer}", "attention"
            )
            """,
        ),
        (
            "md",
            """
            ## What pruning leaves

            The cosine that decides where to select, the patches that are kept, and the rows each layer processes.
            """,
        ),
        (
            "code",
            """
            pruned = observe(chat, PICTURE, QUESTION, config)
            trace = pruned.trace
            draw_cosine_curve(
                {"dense run": smallest_cosines(dense.last), "pruned run": smallest_cosines(pruned.last)},
                "How much the visual token that matters most matters",
                {"layer_threshold": config.layer_threshold},
                trace.select_layer,
                trace.exit_layer,
            )
            """,
        ),
        (
            "code",
            """
            draw_kept(pruned.picture.image, pruned.patches, pruned.kept, f"{pruned.kept.sum()} of {trace.num_visual} visual tokens kept")
            """,
        ),
        (
            "code",
            """
            draw_rows_per_layer(trace.rows_per_layer, trace.num_visual, f"Rows per layer; answer: {pruned.answer}")
            """,
        ),
        (
            "code",
            """
            draw_savings({"VisiPruner": pruned.savings}, "FLOPs saved, by every convention")
            """,
        ),
    ],
    "L1_norms_of_value_matrix": [
        (
            "md",
            f"""
            # Sinks: the L1 norm of the value vectors

            A row can draw much attention and give nothing: if its value vectors are short, what is moved is short too.

            **What the paper says** ({PAPER}): in shallow layers visual tokens serve as passive attention sinks: much
            attention, small values.

            **What to look for**: an orange line below the blue band in the first figure (most attended, shortest values),
            and points far to the right and low in the second. Whether the shipped model has sinks is for the figures to
            say.

            {SMALL}
            """,
        ),
        ("code", PARAMETERS),
        ("code", START),
        (
            "code",
            """
            dense = observe(chat, PICTURE, QUESTION)
            norms = value_norms(dense.recording)
            attention = attention_to_image(dense.recording, dense.last)
            dense.answer
            """,
        ),
        (
            "code",
            """
            draw_norms_per_layer(norms, attention, "L1 norm of visual rows' values, layer by layer")
            """,
        ),
        (
            "md",
            """
            ## One layer, row by row

            A shallow layer, and the layer where one visual token matters most.
            """,
        ),
        (
            "code",
            """
            shallow, layer = 1, int(np.nanargmin(smallest_cosines(dense.last)))
            draw_sinks(norms[shallow], attention[shallow], shallow, f"Attention and value norm, layer {shallow}")
            """,
        ),
        (
            "code",
            """
            draw_sinks(norms[layer], attention[layer], layer, f"Attention and value norm, layer {layer}")
            """,
        ),
        (
            "md",
            """
            ## On the picture

            Attention, value norm, and the probe's measure that multiplies the two: the length of each row's share in the
            last row's output, which is what `tokens_threshold` is held against.
            """,
        ),
        (
            "code",
            """
            maps = np.stack([attention[layer], norms[layer], dense.last.norm[layer]])
            draw_on_picture(
                dense.picture.image, dense.patches, maps, ["attention", "L1 norm of values", "share's length"],
                f"Looked at, and giving something, layer {layer}", "value", columns=3,
            )
            """,
        ),
    ],
    "write_your_own_policy": [
        (
            "md",
            f"""
            # Write your own policy

            The engine keeps text rows, positions, masks and the cache right; a policy only says which visual rows survive,
            and after which layer. Here is one, in a cell, run against VisiPruner ({PAPER}) and against FastV's rule
            (arXiv 2403.06764).

            **The idea tried here**: like VisiPruner, wait for the layer at which the image is read; then keep the rows that
            together hold a given part of all shares' length, instead of those above a fixed norm.

            **What to look for**: whether it answers as the dense model does, and what it saves. A handful of questions is
            an example and no benchmark: `llava/eval` has those.

            {SMALL}
            """,
        ),
        ("code", PARAMETERS),
        ("code", START),
        (
            "code",
            """
            from llava.pruning import Cause, Decision, Policy
            from llava.pruning.baselines import keep_at_layer


            class ShareOfShares(Policy):
                \"\"\"Keep the visual rows with the longest shares until they hold `part` of the length of all shares.\"\"\"

                def __init__(self, prompt, first_layer=4, threshold=0.995, part=0.5):
                    self.first_layer, self.threshold, self.part = first_layer, threshold, part
                    self.selected = False

                def needs_probe(self, layer):
                    return layer > self.first_layer and not self.selected

                def decide(self, layer, num_visual, probe):
                    if probe is None or probe.cosine.min() >= self.threshold:
                        return None
                    self.selected = True
                    order = np.argsort(-probe.norm)
                    held = np.cumsum(probe.norm[order]) / probe.norm.sum()
                    keep = np.zeros(num_visual, dtype=bool)
                    keep[order[: int(np.searchsorted(held, self.part)) + 1]] = True
                    return Decision(keep, Cause.SELECTION)
            """,
        ),
        (
            "code",
            """
            methods = {
                "VisiPruner": {"config": config},
                "share of shares": {"policy": ShareOfShares},
                "FastV, 16 kept": {"policy": keep_at_layer(2, 16)},
            }
            dense = observe(chat, PICTURE, QUESTION)
            runs = {name: observe(chat, PICTURE, QUESTION, **how) for name, how in methods.items()}
            print("dense:", dense.answer)
            for name, run in runs.items():
                print(f"{name}: {run.answer} | selected at layer {run.trace.select_layer}, kept {int(run.kept.sum())}")
            """,
        ),
        (
            "code",
            """
            draw_savings({name: run.savings for name, run in runs.items()}, "FLOPs saved, by every convention")
            """,
        ),
        (
            "code",
            """
            maps = np.stack([run.kept.astype(float) for run in runs.values()])
            draw_on_picture(
                dense.picture.image, dense.patches, maps, list(runs), "Visual tokens kept", "kept", columns=3, shared_scale=True
            )
            """,
        ),
        (
            "md",
            """
            ## More than one question

            Does each method answer as the dense model does? The pictures and questions that come with the model.
            """,
        ),
        (
            "code",
            """
            import json

            folder = SHIPPED_MODEL_PATH.parent / "images"
            questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()][::3][:8]
            agree = {name: 0 for name in methods}
            kept = {name: [] for name in methods}
            for each in questions:
                answer = observe(chat, folder / each["image"], each["text"]).answer
                for name, how in methods.items():
                    run = observe(chat, folder / each["image"], each["text"], **how)
                    agree[name] += run.answer == answer
                    kept[name].append(int(run.kept.sum()))
            for name in methods:
                print(f"{name}: {agree[name]} of {len(questions)} answers as dense, {np.mean(kept[name]):.1f} visual tokens kept on average")
            """,
        ),
    ],
}


def build(name: str) -> nbformat.NotebookNode:
    """The notebook, not yet run."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, (kind, text) in enumerate(NOTEBOOKS[name]):
        new = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        cell = new(dedent(text).strip())
        cell["id"] = f"{name[:20].lower().replace('_', '-')}-{number}"
        if text is PARAMETERS:
            cell.metadata["tags"] = ["parameters"]
        notebook.cells.append(cell)
    return notebook


def main(names: list[str]) -> None:
    for name in names or list(NOTEBOOKS):
        notebook = build(name)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which would differ in every run
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(notebook, path)
        size = path.stat().st_size
        if size > LIMIT:
            raise SystemExit(f"{path} has {size:,} bytes; the limit is {LIMIT:,}")
        print(f"wrote {path.name} ({size // 1024} KiB)")


if __name__ == "__main__":
    main(sys.argv[1:])
