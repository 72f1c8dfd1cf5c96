rule tabulate:
    """Room 7: records -> tables and figures."""
    input:
        study.inputs_of_tables(),
    output:
        summary=report(
            "results/tables/{study}/summary.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"study": "{study}", "table": "every cell"},
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
