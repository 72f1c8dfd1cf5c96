rule quantize:
    """Room 4: the factors of a block of layers in fewer bits."""
    input:
        model=rules.prepare_model.output.folder,
        grams=rules.calibrate.output.grams,
        factors=rules.factorize.output.factors,
        factorization=rules.factorize.output.record,
        fisher=rules.factorize.input.fisher,
    output:
        factors="results/quantization/{model}/{calibration}/{method}-{ratio}-{quantization}/{layers}.safetensors",
        record="results/quantization/{model}/{calibration}/{method}-{ratio}-{quantization}/{layers}.json",
    log:
        "results/quantization/{model}/{calibration}/{method}-{ratio}-{quantization}/{layers}.log",
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe(
            "quantization",
            model=w.model,
            method=w.method,
            ratio=w.ratio,
            quantization=w.quantization,
        ),
        # In one string, so that the command is that of the first studies, which Snakemake would run again otherwise.
        overrides=lambda w, input, output: " ".join(
            [
                study.overrides_for(w.model, w.method, w.ratio, w.quantization),
                *([f"--fisher {input.fisher}"] if input.fisher else []),
            ]
        ),
    shell:
        "python -m cospadi quantize {params.overrides} --model {input.model} --grams {input.grams}"
        " --factors {input.factors} --factorization {input.factorization} --quantized {output.factors}"
        " --record {output.record} > {log} 2>&1"
