"""Recipe files: `reading` takes them as hostile input, ours and mergekit's; `writing` makes the one of an output.

Reading imports pydantic, and is imported late; writing does not.
"""
