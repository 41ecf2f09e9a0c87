"""Stand-ins for object stores, on the loopback, in memory: `python stores.py s3|azure|gcs PORT`.

S3 is moto (tests/stores.txt), Azure is Azurite (npm; FHIRLAKE_AZURITE names its azurite-blob), and Google's is the part of its
XML API that the Rust crate object_store uses, below. Prints "ready" when a bucket `lake` is there; ends with its input.
"""
import base64, datetime, hashlib, hmac, itertools, os, re, subprocess, sys, threading, time, urllib.error, urllib.parse, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape


class Google(BaseHTTPRequestHandler):
    """Objects are (bytes, generation, entity tag, time)."""
    protocol_version = "HTTP/1.1"
    objects, uploads, generations, lock = {}, {}, itertools.count(1), threading.Lock()

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", headers=()):
        self.send_response(code)
        headers = dict(headers)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def asked(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        return bucket, key, query, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def put(self, key, body):
        tag = '"%s"' % hashlib.md5(body).hexdigest()
        self.objects[key] = (body, next(self.generations), tag, datetime.datetime.now(datetime.timezone.utc))
        return self.objects[key]

    def do_PUT(self):
        bucket, key, query, body = self.asked()
        with self.lock:
            if "uploadId" in query:
                self.uploads[query["uploadId"]][int(query["partNumber"])] = body
                return self.answer(200, b"", {"ETag": '"%s"' % hashlib.md5(body).hexdigest()})
            wanted = self.headers.get("x-goog-if-generation-match")
            there = self.objects[bucket, key][1] if (bucket, key) in self.objects else 0
            if wanted is not None and int(wanted) != there:
                return self.answer(412)
            source = self.headers.get("x-goog-copy-source")
            if source:
                source = tuple(urllib.parse.unquote(source).lstrip("/").split("/", 1))
                if source not in self.objects:
                    return self.answer(404)
                body = self.objects[source][0]
            _, generation, tag, _ = self.put((bucket, key), body)
            self.answer(200, b"", {"ETag": tag, "x-goog-generation": str(generation)})

    def do_POST(self):
        bucket, key, query, _ = self.asked()
        with self.lock:
            if "uploads" in query:
                upload = str(next(self.generations))
                self.uploads[upload] = {}
                inner = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
                return self.answer(200, f"<InitiateMultipartUploadResult>{inner}</InitiateMultipartUploadResult>".encode())
            if "uploadId" in query:
                parts = self.uploads.pop(query["uploadId"])
                _, generation, tag, _ = self.put((bucket, key), b"".join(parts[number] for number in sorted(parts)))
                inner = f"<ETag>{escape(tag)}</ETag>"
                body = f"<CompleteMultipartUploadResult>{inner}</CompleteMultipartUploadResult>".encode()
                return self.answer(200, body, {"x-goog-generation": str(generation)})
        self.answer(400)

    def list(self, bucket, query):
        prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter"), query.get("start-after", "")
        found, folders = [], []
        for (name, key), (body, _, tag, changed) in sorted(self.objects.items()):
            if name != bucket or not key.startswith(prefix) or key <= after:
                continue
            if delimiter and delimiter in key[len(prefix):]:
                folder = prefix + key[len(prefix):].split(delimiter)[0] + delimiter
                if folder not in folders:
                    folders.append(folder)
                continue
            changed = changed.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            found.append(f"<Contents><Key>{escape(key)}</Key><LastModified>{changed}</LastModified>"
                         f"<ETag>{escape(tag)}</ETag><Size>{len(body)}</Size></Contents>")
        folders = [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders]
        inner = "".join(["<IsTruncated>false</IsTruncated>", *found, *folders])
        return f"<?xml version=\"1.0\"?><ListBucketResult>{inner}</ListBucketResult>".encode()

    def do_GET(self):
        bucket, key, query, _ = self.asked()
        with self.lock:
            if not key:
                return self.answer(200, self.list(bucket, query))
            if (bucket, key) not in self.objects:
                return self.answer(404)
            body, generation, tag, changed = self.objects[bucket, key]
        headers = {"ETag": tag, "x-goog-generation": str(generation), "Accept-Ranges": "bytes",
                   "Last-Modified": changed.strftime("%a, %d %b %Y %H:%M:%S GMT")}
        wanted = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range") or "")
        if wanted and self.command == "GET":
            size = len(body)
            start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            end = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            if start >= size:
                return self.answer(416)
            return self.answer(206, body[start:end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(body))
        self.answer(200, body, headers)

    do_HEAD = do_GET

    def do_DELETE(self):
        bucket, key, query, _ = self.asked()
        with self.lock:
            if "uploadId" in query:
                self.uploads.pop(query["uploadId"], None)
                return self.answer(204)
            self.answer(204 if self.objects.pop((bucket, key), None) else 404)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that is killed says nothing of the store."""


def request(url, headers=()):
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=dict(headers))) as answer:
        return answer.status


def make_bucket(kind, port):
    if kind == "s3":
        return request(f"http://127.0.0.1:{port}/lake")
    # The account and key of every Azurite.
    key = base64.b64decode("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
    signed = f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:2021-08-06\n/devstoreaccount1/devstoreaccount1/lake\nrestype:container"
    signature = base64.b64encode(hmac.new(key, signed.encode(), hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Authorization": f"SharedKey devstoreaccount1:{signature}"}
    return request(f"http://127.0.0.1:{port}/devstoreaccount1/lake?restype=container", headers)


def main(kind, port):
    child = None
    if kind == "gcs":
        threading.Thread(target=Server(("127.0.0.1", int(port)), Google).serve_forever, daemon=True).start()
    else:
        commands = {
            "s3": [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port],
            "azure": [os.environ.get("FHIRLAKE_AZURITE", "azurite-blob"), "--silent", "--disableTelemetry", "--inMemoryPersistence",
                      "--blobHost", "127.0.0.1", "--blobPort", port, "--skipApiVersionCheck"],
        }
        child = subprocess.Popen(commands[kind], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                make_bucket(kind, port)
                break
            except urllib.error.HTTPError:
                raise
            except OSError:
                time.sleep(0.1)
    print("ready", flush=True)
    sys.stdin.read()
    if child:
        child.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
