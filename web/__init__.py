"""Faces in a browser: the Gradio tab and the stand-alone app; `comfyui/` holds ComfyUI's front-end files."""
