rule prepare_model:
    """Room 1: an address -> an ordinary transformers checkpoint."""
    output:
        folder=directory("results/sources/models/{model}/checkpoint"),
        record="results/sources/models/{model}/record.json",
    log:
        "results/sources/models/{model}/run.log",
    params:
        recipe=lambda w: study.recipe("model", model=w.model),
        overrides=lambda w, output: study.overrides_for(model=w.model),
    shell:
        "python -m cospadi prepare-model {params.overrides} --folder {output.folder} --record {output.record}"
        " > {log} 2>&1"


rule prepare_text:
    """Room 1: an address -> a list of plain documents."""
    output:
        documents="results/sources/texts/{text}/documents.json",
        record="results/sources/texts/{text}/record.json",
    log:
        "results/sources/texts/{text}/run.log",
    params:
        recipe=lambda w: study.recipe("text", text=w.text),
        overrides=lambda w, output: study.overrides_for(),
    shell:
        "python -m cospadi prepare-text text={wildcards.text} {params.overrides}"
        " --documents {output.documents} --record {output.record} > {log} 2>&1"
