// The search of a page that is opened from disk. Browsers start no worker there, so a hidden frame does its work.
// The theme's own stand-in, iframe-worker, would come from another server; its name is what the theme looks for.
class IFrameWorker extends EventTarget {
  constructor(script) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    this.inside = frame.contentWindow
    const page = this.inside.document
    page.open()
    page.write("<!doctype html><body></body>")
    page.close()
    this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
    const element = page.createElement("script")
    element.src = new URL(script, location.href)
    this.ready = new Promise(done => element.addEventListener("load", done))
    page.body.append(element)
  }

  postMessage(data) {
    this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
  }
}

if (location.protocol === "file:") {
  window.IFrameWorker = IFrameWorker
  window.Worker = IFrameWorker
}
