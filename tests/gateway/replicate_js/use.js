// Uses Replicate's JavaScript client as a program would, and prints what came of it as one line of JSON.
// node use.js BASE_URL KEY MODEL OTHER_MODEL

const Replicate = require("replicate");

const [baseUrl, auth, model, otherModel] = process.argv.slice(2);
const replicate = new Replicate({ auth, baseUrl });
const input = { prompt: "fox" };

const wait = (prediction) => replicate.wait(prediction, { interval: 20 });
const refusal = (asking) =>
  asking.then(
    () => null,
    (error) => ({ status: error.response?.status, message: error.message })
  );

async function main() {
  const told = {};

  const created = await replicate.predictions.create({ version: model, input });
  told.created = { id: created.id, status: created.status };
  told.polled = await wait(created);
  told.waited = await replicate.predictions.create({ model: otherModel, input, wait: true });
  told.waitedInVain = await replicate.predictions.create({
    version: model,
    input: { ...input, seconds: 60 },
    wait: 1,
  });
  told.canceled = await replicate.predictions.cancel(told.waitedInVain.id);

  const files = await replicate.run(model, { input: { ...input, num_outputs: 2 } });
  told.run = files.map((file) => file.url().href);
  told.runPolling = (
    await replicate.run(model, { input, wait: { mode: "poll", interval: 20 } })
  ).map(String);

  told.streamed = [];
  for await (const event of replicate.stream(model, { input })) {
    told.streamed.push([event.event, String(event.data)]);
  }

  for (let count = 0; count < 20; count++) {
    await replicate.predictions.create({ version: model, input });
  }
  told.pages = [];
  for await (const page of replicate.paginate(replicate.predictions.list)) {
    told.pages.push(page.map((prediction) => prediction.id));
  }

  told.model = await replicate.models.get(...model.split("/"));
  told.account = await replicate.accounts.current();
  told.failed = await refusal(replicate.run(model, { input: { prompt: "fail" } }));
  told.notFound = await refusal(replicate.predictions.get("nothing-of-the-kind"));
  told.wrongInput = await refusal(
    replicate.predictions.create({ version: model, input: { ...input, seed: -1 } })
  );
  console.log(JSON.stringify(told));
}

main();
