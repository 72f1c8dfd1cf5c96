import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis

hypothesis.settings.register_profile("cospadi", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("cospadi")
