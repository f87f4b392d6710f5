"""Google's notice, 30 seconds ahead, that it takes a spot machine away."""

import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from refocused.run.environment import launch

PRODUCT = Path("/sys/class/dmi/id/product_name")


def metadata_server() -> str | None:
    """Host of the machine's metadata server, found as Google's own libraries find it; None on other machines."""
    if os.environ.get("NO_GCE_CHECK", "").lower() == "true":
        return None
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    try:
        return "metadata.google.internal" if PRODUCT.read_text().startswith("Google") else None
    except OSError:
        return None


def watch(ask: Callable[[str], None]) -> None:
    """On a machine of Google's, a thread of the node's first process calls ask(why) once the machine is to go."""
    if (host := metadata_server()) and not launch().local_rank:
        threading.Thread(target=wait, args=(host, ask), daemon=True, name="preemption").start()


def wait(host: str, ask: Callable[[str], None], pause: float = 10.0) -> None:
    """Ask the server, which answers when the value changes, until it says that the machine was preempted."""
    url = f"http://{host}/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=300&last_etag="
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own machine
    etag = "0"  # none is this, so the first answer comes at once
    while True:
        try:
            request = urllib.request.Request(url + etag, headers={"Metadata-Flavor": "Google"})
            with opener.open(request, timeout=330) as answer:
                if answer.read(16).strip() == b"TRUE":
                    return ask("this machine is being taken away (preempted)")
                etag = answer.headers.get("ETag") or "0"
        except urllib.error.HTTPError as error:
            if error.code == 404:  # this server knows no preemption
                return None
            time.sleep(pause)
        except OSError:
            time.sleep(pause)
        else:
            time.sleep(0.1)  # a server that does not wait must not be asked without end
