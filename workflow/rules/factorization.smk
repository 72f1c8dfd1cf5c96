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


rule expect_losses:
    """Room 3, allocation: what every projection would lose at some ratios."""
    input:
        model=rules.prepare_model.output.folder,
        grams=rules.calibrate.output.grams,
        fisher=rules.fisher.output.factors,
    output:
        "results/factorization/{model}/{calibration}/{method}/losses.json",
    log:
        "results/factorization/{model}/{calibration}/{method}/losses.log",
    threads: 16
    resources:
        gpu=1,
    params:
        recipe=lambda w: study.recipe("losses", model=w.model, method=w.method),
        overrides=lambda w, output: study.overrides_for(model=w.model, method=w.method),
    shell:
        "python -m cospadi expect-losses {params.overrides} --model {input.model} --grams {input.grams}"
        " --fisher {input.fisher} --losses {output} > {log} 2>&1"


rule choose_ratios:
    """Room 3, allocation: the ratio of every projection, at the bits of one ratio for all."""
    input:
        losses=rules.expect_losses.output,
    output:
        "results/factorization/{model}/{calibration}/{method}-{ratio}/ratios.json",
    log:
        "results/factorization/{model}/{calibration}/{method}-{ratio}/ratios.log",
    params:
        recipe=lambda w: study.recipe(
            "factorization", model=w.model, method=w.method, ratio=w.ratio
        ),
        overrides=lambda w, output: study.overrides_for(w.model, w.method, w.ratio),
    shell:
        "python -m cospadi choose-ratios {params.overrides} --losses {input.losses} --ratios {output} > {log} 2>&1"


rule factorize:
    """Room 3: gram and weights -> factors of every projection in a block of layers."""
    input:
        model=rules.prepare_model.output.folder,
        grams=rules.calibrate.output.grams,
        ranks=lambda w: (
            rules.choose_ranks.output if study.searches_ranks(w.method) else []
        ),
        fisher=lambda w: (
            rules.fisher.output.factors if study.needs_fisher(w.method) else []
        ),
        ratios=lambda w: rules.choose_ratios.output if study.allocates(w.method) else [],
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
        # Named as in the first studies: with another command Snakemake would run all of them again.
        ranks=lambda w, input: " ".join(
            f"--{name} {input.get(name)}"
            for name in ("ranks", "fisher", "ratios")
            if input.get(name)
        ),
    shell:
        "python -m cospadi factorize {params.overrides} --model {input.model} --grams {input.grams} {params.ranks}"
        " --layers {wildcards.layers} --factors {output.factors} --record {output.record} > {log} 2>&1"
