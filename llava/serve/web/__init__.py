"""The page of `llava.serve.gradio_pruning` (extra ``web``).

`state.py` holds what a browser tab has said and shown, and knows no gradio; `settings.py` the configs that the page
offers; `late.py` a model whose weights are still being read; `show.py` draws a conversation as HTML; `page.py` lays the
page out and ties its controls to all of these. `style.css` is its look.
"""
