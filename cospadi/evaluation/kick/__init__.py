"""The LLM-KICK protocol (arXiv:2310.01382), as far as no paid model judges answers: lm-eval tasks beside the stock ones.

A compressed model may keep its perplexity and lose what it knows. LLM-KICK asks for knowledge without help (factoid and trivia
questions, MMLU), for knowledge that stands in the prompt (trivia questions with evidence), and for a summary of a text.

============================  ==============================  =================================================================
task                          data                            what is asked
============================  ==============================  =================================================================
``kick_factoid``              FreebaseQA, eval                a question alone
``kick_triviaqa_closed``      TriviaQA rc, validation         a question alone
``kick_triviaqa_open``        the same questions              evidence first: wiki page, then web page, the first 3072 letters
``kick_summarization``        CNN/DailyMail 3.0.0, test       a summary of an article's first 400 words
``mmlu``                      lm-eval's own task
============================  ==============================  =================================================================

As in LLM-KICK's code (github.com/VITA-Group/llm-kick): the data sets, the evidence and where it is cut, 32 new tokens for a trivia
answer, and what its tables call accuracy, here ``contains``: an alias of the answer occurs, letter by letter, in what the model
wrote. Beside it ``exact_match`` and the token ``f1`` of TriviaQA's official script. Everything is normalised like there: lower
case, no punctuation, no articles.

Not as there: prompts are worded anew. Decoding is greedy for summaries, too, and an answer ends with its line. Only what the model
wrote is searched, not the question before it. An answer that is merely part of an alias is not right (an empty one would be part
of each). Factoid questions are those of the eval split, with the aliases of every parse. Summaries are compared with the
reference by ROUGE F1, not by GPT-4. MT-bench, whose answers GPT-4 judges, is left out.
"""

FREEBASE_QA = "https://raw.githubusercontent.com/kelvin-jiang/FreebaseQA/master/FreebaseQA-eval.json"
HUB_SOURCES = {
    # this repository holds a script, which `datasets` runs no more; the script fetched the authors' own file
    ("KelvinJiang/freebase_qa", None): {"path": "json", "data_files": {"test": FREEBASE_QA}, "field": "Questions"},
    # one of three splits, which spares 8 GB
    ("mandarjoshi/trivia_qa", "rc"): {
        "path": "mandarjoshi/trivia_qa",
        "name": "rc",
        "data_files": {"validation": "rc/validation-*"},
        "verification_mode": "no_checks",
    },
}
"""What is loaded from the hub in place of a data set (id, configuration). A mirror holds the data set itself."""
