"""The language model of lm/stdlib.py on files of your own: text, jsonl or parquet, as bytes or through a tokenizer.

    gnomon train --config configs/lm/text.py --config.data.paths="['notes/**/*.md']"
    gnomon train --config configs/lm/text.py --config.data.paths="['d/*.jsonl']" --config.data.field=text
    gnomon train --config configs/lm/text.py --config.data.paths="['book.txt']" --config.data.split=position \\
        --config.data.tokenizer=tokenizer.json

Time: that of lm/stdlib.py. The score depends on the text; a table at the end compares with gzip, bz2 and xz on the same bytes.
"""

from ml_collections import ConfigDict, config_dict

from configs.lm import stdlib

ARGS = stdlib.ARGS


def get_config(arg: str = "") -> ConfigDict:
    config = stdlib.get_config(arg)
    config.data = {
        "name": "files",
        "paths": ["README.md", "docs/**/*.md"],  # patterns; `**` goes through folders
        "tokenizer": "bytes",  # or the path of a Hugging Face tokenizers JSON file
        "split": "position",  # "document": whole documents, by hash; "position": the last 10% of all bytes are held out
        "field": config_dict.placeholder(str),  # what holds the text of a jsonl object or a parquet row
        "separator": "",  # put after every document
    }
    return config
