"""Whether a run of the demo showed what it is about: `demo_proof.py KILLED URL < history.json`.

KILLED is the worker that was killed, URL that of `demo_server.py`, and the history that of the workflow, as
`mvmci history ID --json` prints it. Prints how often the server did each request, and fails with a sentence
if that was not once each, or if the job would have gone the same way without the kill.
"""

import json
import sys
import urllib.request


def missed(records: list[dict], killed: str, counts: dict[str, int]) -> str:
    """Why this shows nothing; empty if it does. `counts` are those of the server, by request."""
    leases = [place for place, record in enumerate(records) if record["record"] == "lease"]
    holders = [records[place]["unit"] for place in leases]
    if len(leases) < 2 or holders[-2] != killed or records[leases[-1]]["why"] != "recovered":
        return f"{killed} was killed, but nothing was taken over from it: {', '.join(holders)} held the job"
    if holders[-1] == killed:
        return f"{killed} took its own job again: nobody else had to"
    before = records[leases[-1] - 1]
    if before["record"] != "intent":
        return f"{killed} was killed between two effects, behind a {before['record']}: none was cut off"
    if records[-1].get("status") != "succeeded":
        return "the workflow did not succeed"
    begun = {record["index"] for record in records if record.get("kind") == "http"}
    if len(counts) != len(begun) or any(times != 1 for times in counts.values()):
        return f"the workflow made {len(begun)} requests, and the server did {counts}"
    return ""


def main() -> None:
    """Look, and say what there is to say."""
    killed, url = sys.argv[1:]
    with urllib.request.urlopen(f"{url}/counts") as answer:
        counts = json.load(answer)
    for request, times in counts.items():
        print(f"{request}: {times} time{'s' if times != 1 else ''}")
    if why := missed(json.load(sys.stdin), killed, counts):
        sys.exit(f"Error: this run of the demo shows nothing: {why}")


if __name__ == "__main__":
    main()
