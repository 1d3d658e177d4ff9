"""`hft serve`: transformers' OpenAI-compatible server, for HFT models."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import transformers

import hft


def serve(model: str, rest: Sequence[str]) -> int:
    """Serves until it is stopped.

    `transformers serve` looks an architecture up in the package transformers itself; there it finds HFT's, too. What a
    request has wrong, such as the name of a task, is answered in a sentence, with status 400.

    Args:
        model: folder or Hub id.
        rest: the other arguments of `transformers serve`.

    Raises:
        ImportError: the server's packages are missing.
    """
    transformers.HFTForCausalLM = hft.HFTForCausalLM
    try:
        from transformers.cli.serving import server
        from transformers.cli.transformers import main
    except ImportError as error:
        raise ImportError(
            f"`hft serve` needs the packages of transformers' server: pip install 'transformers[serving]' ({error})."
        ) from error
    server.build_server = _explaining(server.build_server)
    sys.argv = ["transformers", "serve", model, *rest]
    main()
    return 0


def _explaining(build_server: Any) -> Any:
    """Builds the same application, in which a ValueError, as `generate` raises it, is a mistake of the request."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    @functools.wraps(build_server)
    def build(*args: Any, **kwargs: Any) -> Any:
        app = build_server(*args, **kwargs)

        @app.exception_handler(ValueError)
        async def explain(_: Request, error: ValueError) -> JSONResponse:
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

        return app

    return build
