"""The one component of the page that is not gradio's own; gradio writes a stub (.pyi) beside the module that has it."""

from __future__ import annotations

from typing import Any

import gradio as gr


class UploadedFile(gr.File):
    """A file that was uploaded. Unlike gradio's own it takes no URL for the server to fetch."""

    is_template = True  # drawn by gradio as the class it extends

    def move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error("files are not fetched from URLs; upload the file")
        return super().move_resource_to_block_cache(url_or_file_path)
