"""An HTTP server of an edited model: transformers' own, with edits, metrics and a page.

`app.build_app` makes it; `grace serve` runs it. What it needs beside transformers is the extra
`serve`; nothing of that is imported before `requirements.check` has seen it.
"""
