"""A real RTSP server (gst-rtsp-server), run by the system's Python: not a test, a program.

    python3 rtsp_server.py PORT CLIP [--user U --password P] [--epoch SECONDS] [--record PATH]

CLIP is what `cameras.write_feed` wrote: H.264 pictures one after another. The scene goes on by the clock,
from `epoch`, whether anybody looks or the server is there at all. Every path plays it; --record names one
that takes a stream instead, and gives it to whoever plays PATH-played.
"""

import argparse
import pathlib
import struct
import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

HEADER = struct.Struct("<dI")  # frames per second, number of pictures
PICTURE = struct.Struct("<?I")  # key frame or not, bytes


def read_feed(path):
    with pathlib.Path(path).open("rb") as file:
        rate, count = HEADER.unpack(file.read(HEADER.size))
        pictures = []
        for _ in range(count):
            key, size = PICTURE.unpack(file.read(PICTURE.size))
            pictures.append((key, file.read(size)))
    return rate, pictures


class Camera(GstRtspServer.RTSPMediaFactory):
    """One encoded picture after another, when each is due. A new viewer starts with a key frame."""

    def __init__(self, path, epoch):
        super().__init__()
        self.rate, self.pictures = read_feed(path)
        self.epoch = epoch
        self.set_shared(False)
        self.set_stop_on_disconnect(True)

    def do_create_element(self, url):
        return Gst.parse_launch(
            "appsrc name=source is-live=true format=time "
            "caps=video/x-h264,stream-format=byte-stream,alignment=au "
            "! h264parse ! rtph264pay name=pay0 pt=96 config-interval=-1"
        )

    def do_configure(self, media):
        source = media.get_element().get_by_name("source")
        now = int((time.time() - self.epoch) * self.rate)
        # Back to the last key frame: its successors up to now are sent at once, as a camera's buffer is.
        first = now
        while not self.pictures[first % len(self.pictures)][0]:
            first -= 1
        state = {"next": first, "first": first, "alive": True}
        media.connect("unprepared", lambda *_: state.update(alive=False))

        def push():
            if not state["alive"]:
                return False
            due = (time.time() - self.epoch) * self.rate
            while state["next"] <= due:
                _, data = self.pictures[state["next"] % len(self.pictures)]
                buffer = Gst.Buffer.new_wrapped(data)
                buffer.pts = buffer.dts = int((state["next"] - state["first"]) / self.rate * Gst.SECOND)
                buffer.duration = int(Gst.SECOND / self.rate)
                state["next"] += 1
                if source.emit("push-buffer", buffer) != Gst.FlowReturn.OK:
                    return False
            return True

        GLib.timeout_add(5, push)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port")
    parser.add_argument("clip")
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--epoch", type=float, default=0.0)
    parser.add_argument("--record")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--address", default="127.0.0.1")
    options = parser.parse_args()
    Gst.init(None)
    server = GstRtspServer.RTSPServer.new()
    server.set_address(options.address)
    server.set_service(options.port)
    if options.user:
        auth, token = GstRtspServer.RTSPAuth.new(), GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(options.user, options.password), token)
        server.set_auth(auth)
    mounts = server.get_mount_points()
    for number in range(options.cameras):
        camera = Camera(options.clip, options.epoch)
        if options.user:
            permissions = GstRtspServer.RTSPPermissions()
            permissions.add_permission_for_role("viewer", "media.factory.access", True)
            permissions.add_permission_for_role("viewer", "media.factory.construct", True)
            camera.set_permissions(permissions)
        mounts.add_factory("/cam" if options.cameras == 1 else f"/cam{number}", camera)
    if options.record:
        taker = GstRtspServer.RTSPMediaFactory.new()
        taker.set_transport_mode(GstRtspServer.RTSPTransportMode.RECORD)
        taker.set_launch(
            "( rtph264depay name=depay0 ! h264parse ! video/x-h264,stream-format=byte-stream "
            f"! filesink buffer-mode=unbuffered location={options.record} )"
        )
        mounts.add_factory("/recorded/clip", taker)
        mounts.add_factory("/recorded", taker)
    if not server.attach(None):
        sys.exit("cannot listen")
    print("listening", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
