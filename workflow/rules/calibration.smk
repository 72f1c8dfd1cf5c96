rule calibrate:
    """Room 2: calibration text through the dense model -> one gram per shared input."""
    input:
        model=rules.prepare_model.output.folder,
        documents=lambda w: f"results/sources/texts/{study.root.calibration.text.name}/documents.json",
    output:
        grams=directory("results/calibration/{model}/{calibration}/grams"),
        record="results/calibration/{model}/{calibration}/record.json",
    log:
        "results/calibration/{model}/{calibration}/run.log",
    threads: 16  # or as many as --cores allows
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe("calibration", model=w.model),
        overrides=lambda w, output: study.overrides_for(model=w.model),
    shell:
        "python -m cospadi calibrate {params.overrides} --model {input.model} --documents {input.documents}"
        " --grams {output.grams} --record {output.record} > {log} 2>&1"


rule fisher:
    """Room 2: calibration text forward and back through the dense model -> what the loss cares about."""
    input:
        model=rules.prepare_model.output.folder,
        documents=rules.calibrate.input.documents,
    output:
        factors=directory("results/calibration/{model}/{calibration}/fisher"),
        record="results/calibration/{model}/{calibration}/fisher.json",
    log:
        "results/calibration/{model}/{calibration}/fisher.log",
    threads: 16  # or as many as --cores allows
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe("fisher", model=w.model),
        overrides=lambda w, output: study.overrides_for(model=w.model),
    shell:
        "python -m cospadi fisher {params.overrides} --model {input.model} --documents {input.documents}"
        " --factors {output.factors} --record {output.record} > {log} 2>&1"
