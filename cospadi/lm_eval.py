"""``python -m cospadi.lm_eval …``: the lm_eval command line, able to load compressed checkpoints (``--model hf``)."""

import sys

from cospadi.errors import UserError, require_extra


def main() -> None:
    """As ``lm_eval`` itself; its own command line has no place for a plug-in."""
    require_extra("study", "python -m cospadi.lm_eval")
    from lm_eval.__main__ import cli_evaluate  # after the check, which says what is missing

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
