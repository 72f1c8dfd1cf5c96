rule evaluate_dense:
    """Room 6: the dense model, whose hidden states all others are compared with."""
    input:
        model=rules.prepare_model.output.folder,
        documents=study.documents(study.root.evaluation.text),
        second=study.documents(study.root.evaluation.second_text),
    output:
        record="results/evaluation/{model}/dense/{evaluation}/record.json",
        reference="results/evaluation/{model}/dense/{evaluation}/reference.safetensors",
        samples=directory("results/evaluation/{model}/dense/{evaluation}/samples"),
    log:
        "results/evaluation/{model}/dense/{evaluation}/run.log",
    threads: study.root.evaluation.threads
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe("evaluation", model=w.model),
        overrides=lambda w, output: study.overrides_for(model=w.model),
    shell:
        "python -m cospadi evaluate {params.overrides} --model {input.model} --documents {input.documents}"
        " --second-text-files {input.second} --reference {output.reference} --samples {output.samples} --record {output.record} > {log} 2>&1"


rule evaluate:
    """Room 6: a compressed model, measured like the dense one and against it."""
    input:
        model=rules.prepare_model.output.folder,
        documents=rules.evaluate_dense.input.documents,
        second=rules.evaluate_dense.input.second,
        reference=rules.evaluate_dense.output.reference,
        factors=lambda w: study.factors(
            study.cell(w.model, w.method, w.ratio, w.quantized), "safetensors"
        ),
    output:
        record="results/evaluation/{model}/{calibration}/{method}-{ratio}{quantized}/{evaluation}/record.json",
        samples=directory(
            "results/evaluation/{model}/{calibration}/{method}-{ratio}{quantized}/{evaluation}/samples"
        ),
    log:
        "results/evaluation/{model}/{calibration}/{method}-{ratio}{quantized}/{evaluation}/run.log",
    threads: study.root.evaluation.threads
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe("evaluation", model=w.model),
        overrides=lambda w, output: study.overrides_for(
            w.model, w.method, w.ratio, w.quantized.removeprefix("-") or "none"
        ),
    shell:
        "python -m cospadi evaluate {params.overrides} --model {input.model} --documents {input.documents}"
        " --second-text-files {input.second} --factors-files {input.factors} --reference {input.reference}"
        " --samples {output.samples} --record {output.record} > {log} 2>&1"
