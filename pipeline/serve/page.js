// The two clips of an answer play in step: what is done to one is done to the other.
(() => {
  const others = (video) => {
    const pair = video.closest && video.closest(".vans-pair");
    return pair ? [...pair.querySelectorAll("video")].filter((each) => each !== video) : [];
  };
  const aligned = (video, other) => {
    if (Math.abs(other.currentTime - video.currentTime) > 0.15) other.currentTime = video.currentTime;
  };
  const on = (name, act) => document.addEventListener(name, (event) => others(event.target).forEach((other) => act(event.target, other)), true);
  on("play", (video, other) => { aligned(video, other); if (other.paused) other.play().catch(() => {}); });
  on("pause", (video, other) => { if (!other.paused && !video.ended) other.pause(); });
  on("seeked", aligned);
})();
