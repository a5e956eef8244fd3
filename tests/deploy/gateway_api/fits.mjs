// Says what of the HTTPRoute on stdin the Gateway API's CustomResourceDefinition does not admit.
import { readFileSync } from "node:fs";
import { HTTPRoute } from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute";

try {
  new HTTPRoute(JSON.parse(readFileSync(0, "utf8"))).validate();
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
