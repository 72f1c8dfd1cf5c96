rule track:
    """Room 8: records, tables and figures -> W&B runs, kept as files and uploaded when there is a key and a network."""
    input:
        records=study.inputs_of_tables(),
        tables=rules.tabulate.output,
    output:
        "results/tracking/{study}/record.json",
    log:
        "results/tracking/{study}/run.log",
    params:
        recipe=study.recipe("tracking"),
        overrides=lambda w, output: study.typed,
        folder=lambda w, output: os.path.dirname(output[0]),
    shell:
        "python -m cospadi track {params.overrides} --folder {params.folder} > {log} 2>&1"
