"""Downloads from the Hugging Face hub: the small files of a repository first, then only the weights that these name.

    config.json, tokenizer, index, qmix.json      by name, whatever else the repository holds
    a checkpoint's weights                        the files that its index names; without one, model.safetensors
    a store's weights                             the files that qmix.json names
    a GGUF model                                  the file that is named, and its other pieces; nothing else

Repositories hold the same weights in other layouts too (consolidated.safetensors, original/, onnx/, checkpoint-500/).
None of them is fetched, and pickled weights never are. What is to be fetched and the free disk space are said, and
compared, before the first weight is fetched. A checkpoint whose config.json says that it is quantized already is
refused before its weights are fetched.

names.py reads hub ids; repository.py finds out what is there and what of it is needed, by contents.py; fetching.py
fetches files, blobs.py one; preview.py the header of a GGUF file alone; private.py has
downloads that are given up while they are used, discarded.py what of them is gone; errors.py says what the library
raises.
"""

from qmix.hub.names import HubName
from qmix.hub.preview import is_preview
from qmix.hub.private import claimed, drop_weights, private_cache, private_folder, refetch
from qmix.hub.repository import (
    CONFIG,
    FILES,
    INDEX,
    MANIFEST,
    SINGLE,
    Access,
    Found,
    Wanted,
    download,
    find,
    free_source,
    is_commit,
    is_offline,
    newest_commit,
)

__all__ = ["CONFIG", "FILES", "INDEX", "MANIFEST", "SINGLE", "Access", "Found", "HubName", "Wanted", "claimed",
           "download", "drop_weights", "find", "free_source", "is_commit", "is_offline", "is_preview",
           "newest_commit", "private_cache", "private_folder", "refetch"]
