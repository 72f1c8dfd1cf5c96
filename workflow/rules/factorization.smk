rule search_ranks:
    """Room 3, asvd with a rank search: what each projection costs when truncated alone."""
    input:
        model=rules.prepare_model.output.folder,
        documents=rules.calibrate.input.documents,
        grams=rules.calibrate.output.grams,
    output:
        "results/factorization/{model}/{calibration}/{method}/sensitivity.json",
    log:
        "results/factorization/{model}/{calibration}/{method}/sensitivity.log",
    threads: 16  # or as many as --cores allows
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe("sensitivity", model=w.model, method=w.method),
        overrides=lambda w, output: study.overrides_for(model=w.model, method=w.method),
    shell:
        "python -m cospadi search-ranks {params.overrides} --model {input.model} --documents {input.documents}"
        " --grams {input.grams} --sensitivity {output} > {log} 2>&1"


rule choose_ranks:
    """Room 3, asvd with a rank search: the ranks that meet the ratio or the perplexity budget."""
    input:
        model=rules.prepare_model.output.folder,
        documents=rules.calibrate.input.documents,
        grams=rules.calibrate.output.grams,
        sensitivity=rules.search_ranks.output,
    output:
        "results/factorization/{model}/{calibration}/{method}-{ratio}/ranks.json",
    log:
        "results/factorization/{model}/{calibration}/{method}-{ratio}/ranks.log",
    threads: 16
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe(
            "factorization", model=w.model, method=w.method, ratio=w.ratio
        ),
        overrides=lambda w, output: study.overrides_for(w.model, w.method, w.ratio),
    shell:
        "python -m cospadi choose-ranks {params.overrides} --model {input.model} --documents {input.documents}"
        " --grams {input.grams} --sensitivity {input.sensitivity} --ranks {output} > {log} 2>&1"


rule factorize:
    """Room 3: gram and weights -> factors of every projection in a block of layers."""
    input:
        model=rules.prepare_model.output.folder,
        grams=rules.calibrate.output.grams,
        ranks=lambda w: (
            rules.choose_ranks.output if study.searches_ranks(w.method) else []
        ),
    output:
        factors="results/factorization/{model}/{calibration}/{method}-{ratio}/{layers}.safetensors",
        record="results/factorization/{model}/{calibration}/{method}-{ratio}/{layers}.json",
    log:
        "results/factorization/{model}/{calibration}/{method}-{ratio}/{layers}.log",
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe(
            "factorization", model=w.model, method=w.method, ratio=w.ratio
        ),
        overrides=lambda w, output: study.overrides_for(w.model, w.method, w.ratio),
        ranks=lambda w, input: f"--ranks {input.ranks}" if input.ranks else "",
    shell:
        "python -m cospadi factorize {params.overrides} --model {input.model} --grams {input.grams} {params.ranks}"
        " --layers {wildcards.layers} --factors {output.factors} --record {output.record} > {log} 2>&1"
