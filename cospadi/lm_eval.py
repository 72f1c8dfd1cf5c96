"""``python -m cospadi.lm_eval …``: the lm_eval command line, able to load compressed checkpoints (``--model hf``)."""


def main() -> None:
    """As ``lm_eval`` itself; its own command line has no place for a plug-in."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
