"""Putting a finished output on the Hugging Face Hub, through huggingface_hub's own upload of folders.

That upload is resumable: what has arrived is not sent again.
"""

from __future__ import annotations

import os
import warnings
from typing import Final, NamedTuple

from rv_distributed.checkpoint.index import INDEX_FILE
from rv_distributed.errors import OutputError, Problem, RunError, UsageError, one_line
from rv_distributed.storage.uris import HubUri, parse_hub_uri

_LOG_IN: Final = "Log in with hf auth login, or set HF_TOKEN, with a token that may write there."
#: What an earlier push may have left that would be taken for a part of this model.
_REPLACED: Final = ["model*.safetensors", INDEX_FILE]


class Pushed(NamedTuple):
    """What became of a push."""

    url: str
    """Of the commit, or of the pull request."""
    revision: str
    """The commit."""
    private: bool
    """Whether the repository is."""


def hub_target(text: str) -> HubUri:
    """The repository, and the branch if one is named, to push to. Raises UsageError."""
    place = parse_hub_uri(text if text.startswith("hf://") else f"hf://{text}")
    if place.path:
        raise UsageError(f"{place} names a folder in a repository; outputs go to a repository of their own")
    return place


def local_stage(place: HubUri) -> str:
    """Where an output that goes to the Hub is made: in the current directory."""
    branch = f"@{place.revision.replace('/', '--')}" if place.revision else ""
    return os.path.abspath(f"{place.repo.replace('/', '--')}{branch}.hub")


def push_problem(place: HubUri) -> Problem | None:
    """Why one could not push there, as far as the Hub tells without a push."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from rv_distributed.storage.hub import explained

    api = HfApi()
    try:
        own = api.whoami()
        try:
            api.auth_check(place.repo, write=True)
        except RepositoryNotFoundError:
            namespace = place.repo.partition("/")[0]
            if namespace not in {own["name"], *(org["name"] for org in own.get("orgs", ()))}:
                what = f"cannot be made: {own['name']} is no member of {namespace}"
                return Problem(str(place), what, "Check the name; or ask there to be let in.")
    except Exception as error:
        # Of the HTTP library's errors there is no base to name here: see `storage.hub`.
        return Problem(str(place), f"cannot be pushed to: {explained(error)}", _LOG_IN)
    return None


def push_folder(folder: str, place: HubUri, *, public: bool = False, create_pr: bool = False) -> Pushed:
    """Upload all of a local output; a repository that does not exist is made, private unless ``public``.

    Raises OutputError when the repository cannot be written to, RunError when the upload fails: another call goes on
    from there.
    """
    from huggingface_hub import HfApi

    from rv_distributed.storage.hub import explained

    api = HfApi()
    problem = push_problem(place)
    if problem is not None:
        raise OutputError(str(problem))
    try:
        api.create_repo(place.repo, private=not public, exist_ok=True)
        if place.revision is not None and not place.revision.startswith("refs/"):
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        with warnings.catch_warnings():
            # The tables of an output are no data set that went astray.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            done = api.upload_folder(
                repo_id=place.repo,
                folder_path=folder,
                revision=place.revision,
                create_pr=create_pr,
                commit_message="Made with rv_distributed",
                delete_patterns=_REPLACED,
            )
        revision = f"refs/pr/{done.pr_num}" if create_pr else place.revision
        info = api.model_info(place.repo, revision=revision, files_metadata=True)
    except Exception as error:
        raise RunError(f"{place}: the upload failed: {explained(error)}. What has arrived is kept there.") from error
    there = {file.rfilename: file.size for file in info.siblings or ()}
    here = {
        os.path.relpath(os.path.join(parent, name), folder): os.path.getsize(os.path.join(parent, name))
        for parent, _, names in os.walk(folder)
        for name in names
    }
    missing = sorted(name for name, size in here.items() if there.get(name) != size)
    if missing:
        raise RunError(f"{place}: {one_line(', '.join(missing))} did not arrive whole; push again")
    return Pushed(str(done.pr_url if create_pr else done.commit_url), str(info.sha), bool(info.private))
