rule rulegraph:
    """Room 7: which rules a study is made of, for the report's picture of them."""
    output:
        "results/tables/{study}/rulegraph.dot",
    log:
        "results/tables/{study}/rulegraph.log",
    params:
        recipe=study.recipe("tables"),  # its methods and quantizations: other settings change no rule
        snakefile=lambda w, output: workflow.main_snakefile,
        config=lambda w, output: study.snakemake_config,
    shell:
        "python -m snakemake --snakefile {params.snakefile:q} --nolock --rulegraph dot --config {params.config:q}"
        " > {output} 2> {log}"


rule tabulate:
    """Room 7: records -> tables, figures and the report."""
    input:
        study.inputs_of_tables(),
        rules.rulegraph.output,
    output:
        summary=report(
            "results/tables/{study}/summary.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"study": "{study}", "table": "every cell"},
        ),
        page=report(
            "results/tables/{study}/report.html",
            caption="../report/page.rst",
            category="Report",
            labels={"study": "{study}", "page": "everything on one page"},
        ),
        tables=report(
            expand("results/tables/{{study}}/{model}.html", model=study.study.models),
            caption="../report/table.rst",
            category="Tables",
            labels={"study": "{study}", "table": "as in the paper"},
        ),
        perplexity=report(
            "results/tables/{study}/perplexity.png",
            caption="../report/perplexity.rst",
            category="Figures",
            labels={"study": "{study}", "figure": "perplexity"},
        ),
        pareto=report(
            "results/tables/{study}/pareto.png",
            caption="../report/pareto.rst",
            category="Figures",
            labels={"study": "{study}", "figure": "perplexity against megabytes"},
        ),
        accuracy=report(
            "results/tables/{study}/accuracy.png",
            caption="../report/accuracy.rst",
            category="Figures",
            labels={"study": "{study}", "figure": "accuracy"},
        ),
        output_error=report(
            "results/tables/{study}/output_error.png",
            caption="../report/output_error.rst",
            category="Figures",
            labels={"study": "{study}", "figure": "output error per layer"},
        ),
    log:
        "results/tables/{study}/run.log",
    params:
        recipe=study.recipe("tables"),
        overrides=lambda w, output: study.typed,
        folder=lambda w, output: os.path.dirname(output.summary),
    shell:
        "python -m cospadi tabulate {params.overrides} --folder {params.folder} > {log} 2>&1"
