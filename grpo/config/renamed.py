"""Keys of a configuration that have another name now, or are gone: a file of an older version is told what to write.

`"old.key": "new.key"`, or a sentence for a key that is gone. An entry stays for ever, so that no old file is misread.
"""

RENAMED: dict[str, str] = {}
