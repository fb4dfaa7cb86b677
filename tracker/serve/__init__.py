"""A page and an API for a live run (extra `serve`): `Server`, from `ServeOptions`.

    options   where to listen, and who may
    access    who is let in, and with what: hosts, origins, tokens, sizes
    app       the API
    video     pictures of many streams through one connection
    metrics   numbers for Prometheus
    server    the thread that all this runs in
    static/   the page: HTML, CSS and JavaScript as they are, no build step

Nothing here holds up the tracking: the page asks, the run never waits for it. Only `options` is imported
without the extra.
"""
